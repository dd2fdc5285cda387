"""How a process computes: device, ranks, locks."""
