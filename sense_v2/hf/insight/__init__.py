"""What a memory does and whether it helps: evaluation, ablation, analysis."""
