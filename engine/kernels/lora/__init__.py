"""Batched LoRA over segments of any rank: y[t] += (x[t] · A[a(t)]ᵀ) · B[a(t)]."""
