"""A distributed batch pipeline for images: Ray Train trains ResNets, Ray Data classifies and embeds with them."""

import os

__version__ = "0.3.0"

# OpenMP's threads spin at every barrier by default: on cores shared with decoding threads or neighbours that is ten
# times slower than sleeping. Read when torch is first imported, hence here.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
