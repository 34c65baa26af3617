"""Results kept between calls and between runs."""
