"""What a model predicts and how well: one definition of loss, for training and evaluation."""
