"""How the passes of a step are run, whoever owns the loop."""
