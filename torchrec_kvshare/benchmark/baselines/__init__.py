"""What the shared way is compared with."""
