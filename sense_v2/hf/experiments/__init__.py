"""Experiments: models trained side by side, to see what the memory did"""
