"""The normalisation of pixels that training, evaluation, prediction and every exported model share."""

MEAN = (0.485, 0.456, 0.406)
"""ImageNet mean of red, green and blue, for pixels in [0, 1]."""
STD = (0.229, 0.224, 0.225)
"""ImageNet standard deviation of red, green and blue, for pixels in [0, 1]."""
