"""The parts of an algorithm at work: composed, batched, scored, and watched. Pure functions; no Ray."""
