"""Read labels of samples in tars (digits, text or a field of JSON) and number their classes."""

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any, BinaryIO

from precompute.sources.tar_members import BlockReader
from schemas.sample import LABEL_MEMBER, UNLABELED

NUMBER = re.compile(r"-1|[0-9]{1,9}")
NONE = str(UNLABELED)
MAX_BYTES = 1000
"""Maximum size of a label's text in bytes; a larger member is not a label."""
JSON_FIELDS = (LABEL_MEMBER, "label", "class", "label_id", "class_id", "target", "category")
"""Fields that may hold the label in a JSON member, as used with img2dataset and Hugging Face."""
LABEL_NAMES = {LABEL_MEMBER, "label", "labels", "class", "classname", "target", "category"}
"""Parts of an extension that suggest that the member is a label."""
PLAIN_CLASSES = 100_000
SPARSE = 10
"""Limits for numeric labels (our choice). A label is the number of a class if it is below
PLAIN_CLASSES, or below SPARSE times the number of distinct labels up to it. Otherwise it is treated
as an identifier, because a list of classes up to it would have millions of empty ones."""

Members = Sequence[tuple[str, int, int]]


class LabelError(Exception):
    """Raised if a sample's label cannot be read; the message becomes the detail of a reject."""


class LabelReader:
    """Reads the label of a sample as text.

    Args:
        member: extension of the label's member; `json:FIELD` or `json.FIELD` for a field of a JSON
            member; `none` for no labels; "" for `cls` and, without a `cls`, a field of `json`.
        text: whether to treat labels as class names even if they are digits.
    """

    def __init__(self, member: str, text: bool):
        self.member, self.text = member.lstrip("."), text

    def can_read(self, extension: str) -> bool:
        """Return whether a sample's label may be in its member with this extension."""
        if self.member == "none":
            return False
        if not self.member:
            return extension in (LABEL_MEMBER, "json")
        return extension == self.member or self.member.startswith(
            (f"{extension}:", f"{extension}.")
        )

    def read(self, members: Members, file: BinaryIO | BlockReader) -> tuple[str, str]:
        """Return the label (`-1` if there is none) and the extension of the member it comes from.

        Raises:
            LabelError: the member is missing, is not a label, or its label cannot be read.
        """
        places = {extension: (offset, size) for extension, offset, size in members}
        if self.member == "none":
            return NONE, ""
        member, field = self.member, ""
        if member and member not in places and re.match(r"(.*\.)?json[:.]", member):
            member, field = re.split(r"(?<=json)[:.]", member, maxsplit=1)
        if not member and LABEL_MEMBER not in places:
            label = (
                self.read_member("json", "", *places["json"], file) if "json" in places else NONE
            )
            if label == NONE:
                refuse_other_names(places)
            return label, "json"
        member = member or LABEL_MEMBER
        if member not in places:
            raise LabelError(f"it has no member {member!r} but {', '.join(list(places)[:8])}")
        return self.read_member(member, field, *places[member], file), member

    def read_member(
        self, member: str, field: str, offset: int, size: int, file: BinaryIO | BlockReader
    ) -> str:
        is_json = member.endswith("json")
        if not is_json and size > MAX_BYTES:
            raise LabelError(f"its {member} has {size} bytes: not a label")
        file.seek(offset)
        content = file.read(size)
        if is_json:
            return self.read_json_field(member, field, content)
        text = content.decode("utf-8-sig", "surrogateescape").strip("\0 \t\r\n")
        if not text or "\n" in text:
            raise LabelError(f"its {member} is {content[:20]!r}: not a label")
        return text

    def read_json_field(self, member: str, field: str, content: bytes) -> str:
        try:
            value: Any = json.loads(content)
        except (ValueError, RecursionError) as error:
            if not self.member:  # not asked for: it is copied unchanged like any other member
                return NONE
            raise LabelError(f"its {member} is not valid JSON ({error})") from error
        if isinstance(value, dict):
            fields = field.split(".") if field else [f for f in JSON_FIELDS if f in value][:1]
            if not fields:
                if not self.member:
                    return NONE
                raise LabelError(f"its {member} has no label but {', '.join(map(str, value))}")
            for name in fields:
                if not isinstance(value, dict) or name not in value:
                    raise LabelError(f"its {member} has no {'.'.join(fields)!r}")
                value = value[name]
        elif not self.member:
            return NONE
        if value is None:
            return NONE
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, (int, str)) or not str(value).strip():
            raise LabelError(f"its {member} holds {str(value)[:40]!r}: not a single label")
        return str(value).strip()


def refuse_other_names(members: Iterable[str]) -> None:
    """Refuse samples whose label seems to have another name, as it would be lost silently.

    Raises:
        LabelError: a member is named like a label.
    """
    for name in members:
        if LABEL_NAMES.intersection(name.lower().split(".")):
            raise LabelError(
                f"its label seems to be {name!r}: choose --label-member {name}, or none; if its "
                "key has dots, --keys-with-dots"
            )


def name_classes(
    labels: Iterable[str], reader: LabelReader
) -> tuple[dict[str, int], list[str], dict[str, str]]:
    """Number the classes of a dataset, given all its labels.

    Labels of digits are numbers of classes. If no label is digits, or if `reader.text` is set, all
    labels are class names, numbered in sorted order.

    Returns:
        the number of each valid label, the names of the classes, and the reason for each invalid
        label.
    """
    distinct_labels = set(labels) - {NONE}
    numbers = {NONE: UNLABELED}
    digits = {label for label in distinct_labels if NUMBER.fullmatch(label)}
    if reader.text or (distinct_labels and not digits):
        names = sorted(distinct_labels)
        numbers |= {label: place for place, label in enumerate(names)}
        return numbers, names, {}
    invalid_labels = {
        label: f"its label is {label[:40]!r}, not digits as others are; --label-text treats all "
        "labels as class names"
        for label in distinct_labels - digits
    }
    largest = UNLABELED
    values = sorted({int(label) for label in digits})
    for count, value in enumerate(values, 1):
        if value < max(PLAIN_CLASSES, SPARSE * count):
            largest = value
    for label in digits:
        if int(label) > largest:
            invalid_labels[label] = (
                f"its label {label} is far above the {len(values)} different ones: an identifier, "
                "not a class number; --label-text treats all labels as class names"
            )
        else:
            numbers[label] = int(label)
    return numbers, [str(label) for label in range(largest + 1)], invalid_labels
