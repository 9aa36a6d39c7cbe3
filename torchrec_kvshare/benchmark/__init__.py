"""What scoring costs: a fair baseline, timers, exact memory, traces, and one format for results."""
