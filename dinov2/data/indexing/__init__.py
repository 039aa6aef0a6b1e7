"""Building the index of a tile tree; :func:`dinov2.data.indexing.build.build_index` is the whole of it."""
