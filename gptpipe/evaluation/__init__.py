"""What a model is worth. One definition of loss, used by training too."""
