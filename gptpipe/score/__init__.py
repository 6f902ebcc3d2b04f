"""How well a model predicts text: one definition of loss, used by training and evaluation."""
