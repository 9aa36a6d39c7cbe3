"""Proofs that scores agree: audit, deterministic mode, parity, golden requests."""
