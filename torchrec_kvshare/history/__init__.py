"""History encoders: prefill turns a history into K/V, attend scores candidates over it."""
