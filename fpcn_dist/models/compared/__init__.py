"""The networks that the paper compares FPCN with, as far as torchvision does not have them; docs/compared.md tells what
is known of each.

AlexNet, GoogLeNet, VGG16 and ResNet-50 are backbones of the plain classifier, and so is LeNet. API-Net is FPCN without
a region, with the gated head on the hardest pairs.
"""
