"""Images whose labels stand in a file of their own, as ImageNet's validation set has them."""

from pathlib import Path

from repa_fast.whole import parse_json
from repa_fast.words import one_line, short, some

from .base import Classes, Files, Labeller, read_classes, read_text, repeats
from .folder import walk


class FlatFolder(Files):
    """Every image below a folder, sorted by path, with its label from a file.

    The file is one of
        lines "ILSVRC2012_val_00000001.JPEG 65" or "... n01751748", in any order;
        one label a line, for the sorted images;
        the devkit's ILSVRC2012_validation_ground_truth.txt with meta.mat beside it;
        dataset.json: {"labels": [["00000/img00000000.png", 6], ...]}.
    Labels count from 0. Names (wnids) need `classes`. The devkit's ids count from 1 in an order of
    its own; meta.mat turns them into wnids, whose sorted order is everyone's.

    Raises:
        ValueError: an image without a label, a label without an image, one given twice, a
            malformed line, a label out of range.
    """

    def __init__(
        self, root: str | Path, labels: str | Path, classes: Classes | None = None
    ) -> None:
        names = sorted(walk(str(root)))
        if not names:
            raise ValueError(f"{root}: no image, expected some")
        table = _LabelFile(Path(labels), read_classes(classes))
        found = table.labels(names)
        lone = [name for name in names if name not in found]
        if lone:
            raise ValueError(f"{labels}: {len(lone)} images have no label: {some(lone)}")
        if len(found) > len(names):
            missing = sorted(set(found) - set(names))
            raise ValueError(f"{labels}: {len(missing)} labels have no image: {some(missing)}")
        super().__init__(Path(root), names, [found[name] for name in names])
        self.class_names = table.labeller.names(self._labels, lambda i: f"{labels}: {names[i]}")


class _LabelFile:
    """One of the formats; `labeller` knows the classes once the labels are read."""

    def __init__(self, path: Path, classes: tuple[str, ...] | None) -> None:
        self.path = path
        self.labeller = Labeller(classes)

    def labels(self, names: list[str]) -> dict[str, int]:
        """Return the label of each image name."""
        if self.path.suffix == ".json":
            return self._unique(self._json_pairs())
        lines = read_text(self.path).rstrip().splitlines()
        if not lines:
            raise ValueError(f"{self.path}: is empty, expected labels")
        if len(lines[0].split()) == 1:
            return self._column(lines, names)
        return self._unique(self._pairs(lines))

    def _pairs(self, lines: list[str]) -> list[tuple[str, int]]:
        """Read lines "name label"; a name may have spaces."""
        pairs = []
        for number, line in enumerate(lines, 1):
            where = f"{self.path} line {number}"
            fields = line.strip().rsplit(maxsplit=1)
            if len(fields) != 2:
                raise ValueError(f"{where}: {short(line)}, expected an image and its label")
            pairs.append((fields[0], self.labeller.label(fields[1], where)))
        return pairs

    def _column(self, lines: list[str], names: list[str]) -> dict[str, int]:
        """Read one label a line."""
        values = [line.strip() for line in lines]
        if len(values) != len(names):
            raise ValueError(f"{self.path}: {len(values)} labels, expected {len(names)}, one each")
        meta = self.path.with_name("meta.mat")
        numbers = all(value.isdecimal() for value in values)
        if numbers and meta.is_file():
            values = self._wnids(values, meta)
        where = (f"{self.path} line {number}" for number in range(1, len(values) + 1))
        labels = list(map(self.labeller.label, values, where))
        if numbers and not meta.is_file() and "0" not in values:
            raise ValueError(
                f"{self.path}: labels start at {min(labels)}, expected 0; the devkit's ids need "
                "its meta.mat beside the file, some of the classes lines IMAGE LABEL"
            )
        return dict(zip(names, labels))

    def _wnids(self, values: list[str], meta: Path) -> list[str]:
        """Return the devkit's ids as wnids, which are the classes unless others were given."""
        from scipy.io import loadmat

        try:
            wnids = {
                str(synset["ILSVRC2012_ID"]): str(synset["WNID"])
                for synset in loadmat(meta, squeeze_me=True)["synsets"]
                if synset["num_children"] == 0
            }
        except Exception as error:  # of any kind: scipy names no base of its own
            reason = one_line(repr(error))
            raise ValueError(f"{meta}: {reason}, expected the devkit's synsets") from error
        for number, value in enumerate(values, 1):
            if value not in wnids:
                raise ValueError(
                    f"{self.path} line {number}: label is {short(value)}, expected an id of {meta}"
                )
        if self.labeller.classes is None:
            self.labeller = Labeller(tuple(sorted(wnids.values())))
        return [wnids[value] for value in values]

    def _json_pairs(self) -> list[tuple[str, int]]:
        content = parse_json(read_text(self.path), self.path)
        try:
            pairs = content["labels"]
            named = [(str(name), label) for name, label in pairs]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f'{self.path}: {error!r}, expected {{"labels": [["IMAGE", LABEL], ...]}}'
            ) from error
        return [(name, self.labeller.label(label, f"{self.path}: {name}")) for name, label in named]

    def _unique(self, pairs: list[tuple[str, int]]) -> dict[str, int]:
        if repeated := repeats([name for name, _ in pairs]):
            raise ValueError(f"{self.path}: {some(repeated)} twice, expected each image once")
        return dict(pairs)
