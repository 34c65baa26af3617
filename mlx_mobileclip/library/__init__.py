"""Photo library: an on-disk index, searched by texts and images."""
