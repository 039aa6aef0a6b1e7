"""The base class and the decoders."""

import io

import numpy as np
import pytest
from PIL import Image

from dinov2.data.datasets.decoders import Decoder, DenseTargetDecoder, ImageDataDecoder, TargetDecoder
from dinov2.data.datasets.extended import ExtendedVisionDataset


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


class OnePicture(ExtendedVisionDataset):
    """Its label is a label map."""

    def get_image_data(self, index):
        return png(Image.new("L", (4, 5), 77))

    def get_target(self, index):
        return png(Image.fromarray(np.array([[3, 200]], dtype=np.uint8)))

    def __len__(self):
        return 1


def test_decoders_are_keyword_only(tmp_path):
    dataset = OnePicture(str(tmp_path), target_decoder=DenseTargetDecoder)
    image, target = dataset[0]
    assert dataset.root == str(tmp_path)
    assert image.mode == "RGB"
    assert image.getpixel((0, 0)) == (77, 77, 77)
    assert np.asarray(target).tolist() == [[3, 200]]


def test_transforms_act_on_the_decoded_pair():
    dataset = OnePicture("", transforms=lambda image, target: (image.size, len(target)))
    assert dataset[0][0] == (4, 5)


def test_abstract_parts():
    dataset = ExtendedVisionDataset("")
    with pytest.raises(NotImplementedError):
        dataset.get_image_data(0)
    with pytest.raises(NotImplementedError):
        dataset.get_target(0)
    with pytest.raises(NotImplementedError):
        len(dataset)
    with pytest.raises(RuntimeError, match="can not read image for sample 0") as caught:
        dataset[0]
    assert isinstance(caught.value.__cause__, NotImplementedError)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
def test_every_mode_becomes_rgb(mode, tiles):
    buffer = io.BytesIO()
    tiles[0].convert(mode).save(buffer, "TIFF")
    image = ImageDataDecoder(buffer.getvalue()).decode()
    assert image.mode == "RGB"
    assert image.size == tiles[0].size


def test_target_decoder_is_the_identity():
    target = object()
    assert TargetDecoder(target).decode() is target
    with pytest.raises(NotImplementedError):
        Decoder(target).decode()
