"""History encoders: prefill turns a history into K/V, attend runs candidates over it."""
