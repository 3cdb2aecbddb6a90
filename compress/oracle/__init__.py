"""The true importance of every channel, and how well each criterion predicts it."""
