"""Names of folders and files that tell the kind of their images: normal, anomalous, masks, training or test images."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

NORMAL, ANOMALOUS, MASKS, TRAIN, TEST = "normal", "anomalous", "masks", "train", "test"

# Unambiguous words, in lower case and without blanks and hyphens.
_SURE = {
    NORMAL: "good ok okay normal nondefect nondefective nodefect nodefects notdefective withoutdefect withoutdefects "
    "defectfree anomalyfree noanomaly flawless gut "
    "良品 正常 合格 정상 양품",
    ANOMALOUS: "bad ng nok notok notgood nogood abnormal anomaly anomalies anomalous defect defects defective faulty "
    "nio flawed fehler fehlerhaft schlecht defekt defecto defaut 不良 不良品 异常 異常 缺陷 不合格 불량 비정상",
    MASKS: "groundtruth gt groundtruths",
    TRAIN: "train training",
    TEST: "test testing val valid validation eval evaluation",
}
# Words that may also name products: they count only beside folders whose names give the contrast.
_PERHAPS = {
    NORMAL: "io pass passed accept accepted negative undamaged intact healthy",
    ANOMALOUS: "ko def fail fails failed failure reject rejects rejected positive damaged broken crack cracked "
    "fault faults",
    MASKS: "mask masks label labels annotation annotations segmentation segmentations",
}
_IMAGES = frozenset(("image", "images", "img", "imgs", "picture", "pictures", "photo", "photos", "data"))
_FILLERS = _IMAGES | {"part", "parts", "sample", "samples", "piece", "pieces", "item", "items", "product", "products"}
_OPPOSITE = {NORMAL: ANOMALOUS, ANOMALOUS: NORMAL}
_LONGEST = 3
SURE = {word: kind for kind, words in _SURE.items() for word in words.split()}
_ANY = SURE | {word: kind for kind, words in _PERHAPS.items() for word in words.split()}
_MASK_ENDING = re.compile(r"[ _.-]+(mask|masks|gt|groundtruth|ground_truth|label|seg)$", re.IGNORECASE)


def kind_of(name: str) -> str | None:
    """The kind that the name of a folder tells unambiguously, whatever folders are beside it; else None."""
    kind, rest, is_sure = _read(name)
    return kind if is_sure and not rest else None


def plain(name: str) -> str:
    """A name in lower case without blanks and hyphens."""
    return "".join(_words(name))


def is_masks(name: str) -> bool:
    """Whether the name is one for masks, in a place where masks are expected."""
    kind, rest, _ = _read(name)
    return kind == MASKS and not rest


def is_normal(name: str) -> bool:
    return kind_of(name) == NORMAL


def is_no_product(name: str) -> bool:
    """Whether the name of a folder says for sure how its images were judged or split, not what they show."""
    return kind_of(name) in (NORMAL, ANOMALOUS, TRAIN)


def telling(names: Iterable[str]) -> dict[str, str]:
    """Kinds of folders beside each other, as far as their names tell; empty unless the names tell different kinds.

    One name for anything but normal images is enough, or two opposite ones such as ``bolt-ok`` and ``bolt-ng``. Beside
    a name for normal images, any other name is that of anomalous ones.
    """
    names = list(names)
    read = {name: _read(name) for name in names}
    said = {name: kind for name, (kind, rest, is_sure) in read.items() if kind is not None and is_sure and not rest}
    for name, (kind, rest, _) in read.items():
        if kind in _OPPOSITE and any(read[other][:2] == (_OPPOSITE[kind], rest) for other in names):
            said[name] = kind
    if said or any(_is_images(name) for name in names):
        said |= {name: MASKS for name, (kind, rest, _) in read.items() if kind == MASKS and not rest}
    if NORMAL in said.values():
        said |= {name: ANOMALOUS for name in names if name not in said}
    kinds = set(said.values())
    return said if kinds & {ANOMALOUS, MASKS} or (TEST in kinds and kinds & {TRAIN, NORMAL}) else {}


def masks_among(names: Sequence[str]) -> list[str]:
    """Which of the folders beside each other hold masks of images in the others, judging by all names."""
    said = telling(names)
    is_known = any(map(_is_images, names)) or set(said.values()) - {MASKS}
    return [name for name, kind in said.items() if kind == MASKS and is_known]


def is_doubtful(name: str) -> bool:
    """Whether a name may be that of a product as well as that of anomalies, masks or test images."""
    kind, rest, is_sure = _read(name)
    return not rest and (kind == TEST or (kind in (MASKS, ANOMALOUS) and not is_sure))


def image_of_mask(stem: str) -> str:
    """The stem of the image that a mask belongs to: ``012`` for ``012_mask``, ``012_GT`` and ``012``."""
    return _MASK_ENDING.sub("", stem)


def kind_of_file(stem: str) -> str | None:
    """Whether the name of a file begins or ends with an unambiguous word for normal or anomalous images."""
    words = _words(stem)
    for n in range(_LONGEST, 0, -1):
        for part in (words[:n], words[-n:]):
            if (kind := SURE.get("".join(part))) in (NORMAL, ANOMALOUS):
                return kind
    return None


def _words(name: str) -> list[str]:
    return re.findall(r"[^\W\d_]+|\d+", name.casefold())


def _read(name: str) -> tuple[str | None, str, bool]:
    """The kind that a name tells, the rest of the name, and whether its word is unambiguous."""
    words = _words(name)
    for n in range(_LONGEST, 0, -1):
        for start in range(len(words) - n + 1):
            word = "".join(words[start : start + n])
            if word in _ANY:
                return _ANY[word], _without_fillers(words[:start] + words[start + n :]), word in SURE
    return None, _without_fillers(words), False


def _without_fillers(words: list[str]) -> str:
    return " ".join(word for word in words if word not in _FILLERS and not (word.isdigit() and len(word) < 3))


def _is_images(name: str) -> bool:
    return name.casefold() in _IMAGES
