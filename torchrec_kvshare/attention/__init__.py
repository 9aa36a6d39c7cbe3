"""Attention from candidates to the one history of their user; needs torch alone."""
