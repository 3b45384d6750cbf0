"""`tamis train-sae`: a sparse autoencoder trained on rows streamed through a student."""
