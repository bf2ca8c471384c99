"""What runs say together: ablations, curves, pictures on one page; read from run folders or from W&B."""
