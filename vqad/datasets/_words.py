"""What the names of folders and files say of the images in them: normal, anomalous, a mask, or one of two splits."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

NORMAL, ANOMALOUS, MASKS, TRAIN, TEST = "normal", "anomalous", "masks", "train", "test"

# Written as one word, as a name is once it has lost its blanks, hyphens and capitals.
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
# These may be products too: they count beside a name that says the opposite, or what the others are.
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
    """What the name of a folder says for sure, whatever other folders there are."""
    kind, rest, is_sure = _read(name)
    return kind if is_sure and not rest else None


def plain(name: str) -> str:
    """A name without blanks, hyphens and capitals."""
    return "".join(_words(name))


def is_masks(name: str) -> bool:
    """Whether a folder, where masks may be expected, is that of them."""
    kind, rest, _ = _read(name)
    return kind == MASKS and not rest


def is_normal(name: str) -> bool:
    return kind_of(name) == NORMAL


def is_no_product(name: str) -> bool:
    """Whether the name of a folder says for sure how its images were judged or split, not what they show."""
    return kind_of(name) in (NORMAL, ANOMALOUS, TRAIN)


def telling(names: Iterable[str]) -> dict[str, str]:
    """What names of folders that lie beside each other say, of those that say something; empty if it is no contrast.

    One name of something else than normal images is enough, or two that say the opposite of the same, such as
    ``bolt-ok`` and ``bolt-ng``. Beside a name for normal images, any other is that of something else.
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
    """Which of the folders beside each other have masks: of images that lie in others of them, as their names say."""
    said = telling(names)
    is_known = any(map(_is_images, names)) or set(said.values()) - {MASKS}
    return [name for name, kind in said.items() if kind == MASKS and is_known]


def is_doubtful(name: str) -> bool:
    """Whether a folder of that name may have no normal images, and as well those of a product called so."""
    kind, rest, is_sure = _read(name)
    return not rest and (kind == TEST or (kind in (MASKS, ANOMALOUS) and not is_sure))


def image_of_mask(stem: str) -> str:
    """The stem of the image that a mask belongs to: that of ``012_mask``, ``012_GT`` and ``012`` is ``012``."""
    return _MASK_ENDING.sub("", stem)


def kind_of_file(stem: str) -> str | None:
    """What the name of a file begins or ends with, of what is sure to tell normal images from anomalous ones."""
    words = _words(stem)
    for n in range(_LONGEST, 0, -1):
        for part in (words[:n], words[-n:]):
            if (kind := SURE.get("".join(part))) in (NORMAL, ANOMALOUS):
                return kind
    return None


def _words(name: str) -> list[str]:
    return re.findall(r"[^\W\d_]+|\d+", name.casefold())


def _read(name: str) -> tuple[str | None, str, bool]:
    """What a name says, what else is in it, and whether its word is never that of a product."""
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
