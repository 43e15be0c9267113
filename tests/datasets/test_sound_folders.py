"""Folders of sounds: understood or refused with the layout expected; what is left out is counted and named."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from audio_llm import audio
from audio_llm.datasets import folders, open_source, sounds
from audio_llm.errors import AudioError, AudioLLMError
from tests import audio_files

WAV = audio.encode(audio.Waveform(np.full((1, 400), 0.1, np.float32), 8000, "mono"), "wav")
URBAN = "slice_file_name,fsID,start,end,salience,fold,classID,class\n"


def put(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(WAV)
    return root


def urbansound(root: Path, audio_folder: str, table: str, form: str = "{name},{fs},0,1,1,{fold},{k},{label}\n") -> Path:
    rows = URBAN
    for fold in (1, 2, 10):
        for k, label in enumerate(("dog_bark", "siren")):
            name = f"{100 * fold + k}-{k}-0-0.wav"
            put(root, f"{audio_folder}fold{fold}/{name}")
            rows += form.format(name=name, fs=100 * fold + k, fold=fold, k=k, label=label)
    (root / table).parent.mkdir(exist_ok=True)
    (root / table).write_text(rows)
    return root


@pytest.mark.parametrize(
    ("audio_folder", "table", "given"),
    [
        ("audio/", "metadata/UrbanSound8K.csv", "."),
        ("", "UrbanSound8K.csv", "."),
        ("audio/", "UrbanSound8K.csv", "."),
        ("audio/", "metadata/UrbanSound8K.csv", "audio"),
    ],
)
@pytest.mark.parametrize(
    "form", ["{name},{fs},0,1,1,{fold},{k},{label}\n", "{name}, {fs}.0,0,1,1,{fold}.0,{k},{label} \n"]
)
def test_urbansound8k_however_it_is_laid_out(audio_folder, table, given, form, tmp_path):
    root = urbansound(tmp_path / "us", audio_folder, table, form)
    library = sounds.find(root / given)
    assert library.dataset == "urbansound8k" and library.labels == ["dog bark", "siren"]
    assert {name: len(clips) for name, clips in sounds.official_folds(library).items()} == {"1": 2, "2": 2, "10": 2}
    assert all(os.path.isfile(clip.path) for clip in library.clips) and not library.left_out


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (("fold1/a.wav", "fold2/b.wav"), "folds without a table"),
        (("audio/1-1-A-0.wav", "audio/1-2-A-1.wav"), "one class alone"),
        (("train/dog/a.wav", "train/cat/a.wav", "test/dog/a.wav"), "splits, not classes.*Give one of them"),
        (("train/a.wav", "val/a.wav", "Testing/b.wav"), "splits, not classes"),
        (("animals/dog/a.wav", "things/bell/b.wav"), "which folder is the class"),
        (("dog/a.wav", "animals/cat/b.wav"), "which folder is the class"),
        (("dog/a.wav",), "one class alone"),
        (("a.wav", "b.wav"), r"left out.*2, a.wav the first \(beside the class folders\)"),
        (("dog/a.m4a", "cat/b.m4a", "cat/._c.wav"), "m4a is no format that is read"),
        ((".Trash-0/dog/a.wav", "@eaDir/cat/b.wav"), "hidden or system folder"),
    ],
)
def test_what_is_no_class_is_refused_with_the_layouts(names, told, tmp_path):
    root = put(tmp_path / "sounds", *names)
    with pytest.raises(AudioError, match=f"expected sounds in one of the layouts ESC-50.*found .*{told}"):
        sounds.find(root)


def test_a_corpus_one_folder_down_is_named(tmp_path):
    urbansound(tmp_path / "UrbanSound8K", "audio/", "metadata/UrbanSound8K.csv")
    with pytest.raises(AudioError, match=r"one folder further down, in UrbanSound8K/"):
        sounds.find(tmp_path)


def test_classes_named_like_splits_or_folds_among_others_are_classes(tmp_path):
    root = put(tmp_path, "train/a.wav", "dog/a.wav", "fold/b.wav", "dog/more/c.wav")
    assert [clip.label for clip in sounds.find(root).clips] == ["dog", "dog", "fold", "train"]


def test_whatever_decoding_reads_is_a_sound(tmp_path):
    """Every format of the containers under its usual endings; the list of endings is no longer than that."""
    endings = {
        "wav 16": ".wav .wave .bwf",
        "rf64 16": ".rf64",
        "w64 16": ".w64",
        "flac 16": ".flac",
        "mp3 constant": ".mp3",
    }
    endings |= {
        "ogg vorbis": ".ogg .oga",
        "ogg opus": ".opus",
        "aiff 16": ".aif .aiff .aifc",
        "au 16": ".au .snd",
        "caf 16": ".caf",
    }
    written = {}
    for kind, names in endings.items():
        data = audio_files.written(np.full((4000, 1), 0.1, np.float32), 16000, kind)
        for ending in names.split():
            for label, name in (("dog", f"x{ending}"), ("cat", f"y{ending.upper()}")):
                path = tmp_path / label / name
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(data)
                written[f"{label}/{name}"] = ending
    library = sounds.find(tmp_path)
    assert {clip.name for clip in library.clips} == set(written) and not library.left_out
    assert set(written.values()) == folders.SUFFIXES - {".sph"}  # which libsndfile does not write
    source = open_source([tmp_path])
    assert {source.load_sample(k).audio[0].channels for k in range(len(source))} == {1}


def test_what_is_left_out_is_counted_and_named(tmp_path):
    root = put(tmp_path, "dog/a.wav", "cat/b.wav", "dog/._a.wav", "cat/u.m4a", "intro.wav", ".git/x.wav", "cat/x.wav/z")
    (root / "dog" / "gone.wav").symlink_to("nowhere.wav")
    (root / "dog" / "again.wav").symlink_to("a.wav")
    (root / "cow").symlink_to("cat")
    library = sounds.find(root)
    assert [clip.name for clip in library.clips] == ["cat/b.wav", "dog/a.wav"]
    assert {item["item"] for item in library.left_out} == {
        *("dog/._a.wav", "cat/u.m4a", "intro.wav", ".git", "cat/x.wav", "dog/gone.wav", "dog/again.wav", "cow"),
    }
    assert "intro.wav (beside the class folders)" in folders.told(library.left_out)


def test_a_row_twice_and_a_sound_in_no_row(tmp_path):
    root = urbansound(tmp_path, "", "UrbanSound8K.csv")
    put(root, "fold1/999-0-0-0.wav")
    assert [item["item"] for item in sounds.find(root).left_out] == ["fold1/999-0-0-0.wav"]
    table = root / "UrbanSound8K.csv"
    table.write_text(table.read_text() + "100-0-0-0.wav,100,0,1,1,1,0,dog_bark\n")
    with pytest.raises(AudioError, match="each file once, found 100-0-0-0.wav several times"):
        sounds.find(root)


@pytest.mark.parametrize(
    "name", ["plain.wav", "-dash.wav", "two words.WAV", "50%20off.wav", "üñí 声.wav", b"caf\xe9.wav"]
)
def test_names_of_every_kind(name, tmp_path):
    put(tmp_path, "dog/a.wav", "cat/b.wav")
    Path(os.fsdecode(os.fsencode(tmp_path / "dog") + b"/" + os.fsencode(name))).write_bytes(WAV)
    source = open_source([tmp_path])
    samples = [source.load_sample(k) for k in range(len(source))]
    assert len(samples) == 3 and len(source.fingerprint) == 64
    for k, sample in enumerate(samples):
        sample.id.encode()
        assert source.load_waveform(k).num_samples == 400


@pytest.mark.parametrize(
    ("on_disk", "in_the_table"),
    [
        ("audio/a b.wav", "audio/a%20b.wav"),
        ("audio/a.wav", "audio/a.wav?download=1"),
        ("audio/a.wav", "audio\\a.wav"),
        ("audio/a.WAV", "audio/a.wav"),
        ("audio/a.flac", "audio/a.wav"),
        ("audio/50%20off.wav", "audio/50%20off.wav"),
        (unicodedata.normalize("NFD", "audio/über.wav"), unicodedata.normalize("NFC", "audio/über.wav")),
        (unicodedata.normalize("NFC", "audio/über.wav"), unicodedata.normalize("NFD", "audio/über.wav")),
    ],
)
def test_the_file_that_a_table_means(on_disk, in_the_table, tmp_path):
    put(tmp_path, on_disk, "audio/other.wav")
    assert folders.find_file(tmp_path, in_the_table) == tmp_path / on_disk


@pytest.mark.parametrize("name", ["../secret.wav", "..%2fsecret.wav", "audio/../../secret.wav", "gone.wav"])
def test_nothing_outside_the_folder_and_nothing_guessed(name, tmp_path):
    put(tmp_path, "secret.wav", "data/audio/a.flac", "data/audio/a.ogg")
    assert not folders.find_file(tmp_path / "data", name).is_file() or ".." in name
    assert folders.find_file(tmp_path / "data", name) == tmp_path / "data" / name
    assert not folders.find_file(tmp_path / "data", "audio/a.wav").is_file()  # two could be meant


def test_a_folder_of_nothing_is_refused_for_shards(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(AudioLLMError, match="shards"):
        open_source([tmp_path])


@pytest.fixture
def linked(tmp_path: Path) -> Path:
    """A folder of texts with a part on another disk, links in circles, and what systems leave behind."""
    root = tmp_path / "root"
    for name in ("a/one.json", "a/deeper/Two.JSON", "a/.hidden.json", "@eaDir/x.json", "notes.txt"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("{}")
    (tmp_path / "disk" / "inner").mkdir(parents=True)
    (tmp_path / "disk" / "inner" / "three.json").write_text("{}")
    (root / "part").symlink_to(tmp_path / "disk")
    (root / "part again").symlink_to(tmp_path / "disk")
    (tmp_path / "disk" / "inner" / "back").symlink_to(root)
    (root / "b").symlink_to("a")
    (root / "a" / "linked.json").symlink_to(tmp_path / "disk" / "inner" / "three.json")
    return root


def test_files_of_a_linked_folder_are_the_folders_own(linked: Path) -> None:
    """``Path.rglob`` leaves them out without a word; each is found once."""
    found = [str(path.relative_to(linked)) for path in folders.files_below(linked, endings=(".json",))]
    assert found == ["a/deeper/Two.JSON", "a/linked.json", "a/one.json", "part/inner/three.json"]
    assert [path.name for path in folders.files_below(linked, named=("o*.json", "t*.txt"))] == ["one.json"]
    assert len(folders.files_below(linked)) == 5 and folders.files_below(linked / "none") == []


def test_what_cannot_be_read_is_not_left_out_in_silence(linked: Path, monkeypatch, capsys) -> None:
    (linked / "a" / "gone.txt").symlink_to("nowhere")
    assert len(folders.files_below(linked, endings=(".json",))) == 4
    with pytest.raises(AudioLLMError, match=r"a/gone\.txt: expected a file, found a link to one that is not there"):
        folders.files_below(linked)
    put(linked, "a/x.wav", "part/y.wav")
    scandir = os.scandir

    def refusing(path: str) -> object:
        if Path(path).name == "part":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(PermissionError):
        folders.files_below(linked, endings=(".json",))
    listed = folders.listing(linked)
    assert listed.files == [Path("a/x.wav")]
    assert {"item": "part", "reason": "a folder that cannot be read: Permission denied"} in listed.left_out
