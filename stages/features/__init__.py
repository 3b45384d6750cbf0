"""Sample features from sparse codes: pooling over tokens and similarity to tasks."""
