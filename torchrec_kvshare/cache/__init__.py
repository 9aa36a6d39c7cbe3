"""K/V kept between requests: identity, pages, and the cache that joins them."""
