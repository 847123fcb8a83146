"""Facts: many at once, taught in several wordings, asked in others, and the damage to the rest measured"""
