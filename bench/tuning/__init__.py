"""`sk-triton tune`: what there is to tune, how a machine tries it, and when a config has won."""
