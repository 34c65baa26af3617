"""A library of photos: an index on disk that texts and images search."""
