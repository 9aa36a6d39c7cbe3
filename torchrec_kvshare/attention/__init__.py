"""Attention operators over shared histories; imports torch only."""
