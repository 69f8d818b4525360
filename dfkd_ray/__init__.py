"""Make trained networks small without their training data.

A teacher goes in; a pruned or smaller student that is as accurate comes out, distilled on images that are
made from the teacher alone. Importing this package does nothing: no device, no seed, no Ray.
"""

__version__ = "0.1.0"
