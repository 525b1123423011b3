"""Training: one readable loop, the parts it is made of, and its wiring to Ray Train."""
