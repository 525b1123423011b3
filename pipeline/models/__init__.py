"""The networks by name, and the bundles in which they travel from training to inference."""
