"""K/V kept between requests: identity, pages, tiers and leases."""
