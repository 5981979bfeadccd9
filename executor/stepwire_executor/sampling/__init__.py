"""What happens to logits around the sampler's kernel: parameters by slot, adjustments, logprobs."""
