"""W&B sweep files, run on this machine without a server. Knows neither torch nor Lightning nor W&B."""
