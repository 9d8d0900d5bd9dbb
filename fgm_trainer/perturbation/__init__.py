"""What a perturbation is and where it is added. Torch alone."""
