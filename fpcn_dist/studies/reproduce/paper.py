"""The numbers of the paper, as printed; its figures are pictures without numbers."""

from __future__ import annotations

from typing import NamedTuple


class System(NamedTuple):
    """A row of Table 2: accuracies in percent."""

    title: str
    train: float
    test: float


class Student(NamedTuple):
    """A row of Table 4: millions of parameters and of multiply-adds, milliseconds an image, accuracies in percent."""

    title: str
    parameters: float
    multiply_adds: float
    milliseconds: float
    baseline: float
    distilled: float | None


TABLE_2 = {
    "alexnet": System("AlexNet", 96.8, 73.1),
    "lenet": System("LeNet", 50.1, 50.5),
    "googlenet": System("GoogLeNet", 86.6, 76.3),
    "vgg16": System("VGG16", 76.1, 72.3),
    "resnet50": System("ResNet-50", 79.6, 72.4),
    "bilinear_cnn": System("Bilinear CNN", 85.4, 85.3),
    "pca_net": System("PCA-Net", 94.9, 90.8),
    "api_net": System("API-Net", 99.8, 91.2),
    "mmal_net": System("MMAL-Net", 99.7, 91.9),
    "fpcn": System("FPCN", 99.8, 93.1),
}

TABLE_3 = {"mask": 92.0, "center": 91.2, "mask_alpha": 92.2, "mask_center": 92.8, "fpcn": 93.1}
"""Test accuracies by the run's name."""

TEACHER = Student("FPCN (teacher)", 46.06, 28_210, 13.98, 93.1, None)
TABLE_4 = {
    "resnet18": Student("ResNet-18", 11.89, 7_294, 2.61, 73.8, 74.7),
    "resnet34": Student("ResNet-34", 22.00, 14_713, 5.63, 74.7, 76.1),
    "resnet50": Student("ResNet-50", 25.76, 16_529, 7.50, 76.5, 77.1),
    "mobilenet_v1": Student("MobileNetV1", 4.2, 1_080, 0.82, 68.7, 71.1),
    "mobilenet_v2": Student("MobileNetV2", 3.4, 1_080, 0.64, 70.9, 73.5),
    "shufflenet_v2_x1_5": Student("ShuffleNetV2", 3.4, 947, 0.73, 70.5, 73.6),
}
"""By the name of the network."""
