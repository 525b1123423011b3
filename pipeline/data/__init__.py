"""From a listing to batches: the manifest, encoded images, pixels, transforms."""
