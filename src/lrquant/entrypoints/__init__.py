"""What the public verbs do: quantize, evaluate, adapt, estimate."""
