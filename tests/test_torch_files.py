"""Files of torch.save: what is read, and what is refused without being run."""

import pickle
import zipfile

import ml_dtypes
import numpy as np
import pytest

from ctrl_diffusion.pretrained import read_torch_file

torch = pytest.importorskip("torch", reason="files written by torch: pip install 'ctrl-diffusion[torch]'")


def saved(tmp_path, value, **options):
    torch.save(value, tmp_path / "file.pt", **options)
    return tmp_path / "file.pt"


def same(stored, tensor):
    array = stored.read()
    assert array.shape == stored.shape == tuple(tensor.shape)
    if tensor.dtype == torch.bfloat16:
        assert array.dtype == ml_dtypes.bfloat16
        array, tensor = array.astype(np.float32), tensor.float()
    assert array.dtype == tensor.detach().numpy().dtype
    np.testing.assert_array_equal(array, tensor.detach().numpy())
    assert array.flags.c_contiguous and array.flags.owndata


TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def test_every_type(tmp_path):
    tensors = {code: (10 * torch.randn(3, 5)).to(dtype) for code, dtype in TYPES.items()}
    found = read_torch_file(saved(tmp_path, tensors))
    assert list(found) == list(TYPES)
    for code, tensor in tensors.items():
        assert found[code].dtype == code
        same(found[code], tensor)


def test_views_and_shared_storages(tmp_path):
    whole = torch.randn(6, 8)
    tensors = {
        "whole": whole,
        "transposed": whole.T,
        "rows": whole[2:5],
        "strided": whole[1::2, ::3],
        "one number": whole[3, 4],
        "expanded": whole[:1].expand(4, 8),
        "permuted": torch.randn(2, 3, 4, 5).permute(3, 0, 2, 1),
        "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "empty": torch.zeros(0, 3),
        "beyond the end, but empty": torch.zeros(3)[3:],
        "a scalar": torch.tensor(2.5),
        "parameter": torch.nn.Parameter(whole[:2]),
        "cut off": whole[4:].clone()[1:],
    }
    found = read_torch_file(saved(tmp_path, tensors))
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        same(found[name], tensor)


def test_what_lies_in_a_training_checkpoint(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    checkpoint = {
        "state_dict": model.state_dict(),  # an OrderedDict with metadata
        "optimizer": optimizer.state_dict(),
        "epoch": 3,
        "name": "a run",
        "shape": torch.Size([3, 4]),
        "dtype": torch.float32,
        "device": torch.device("cpu"),
        "nothing": None,
        "history": [0.5, {"loss": torch.ones(2)}],
    }
    file = saved(tmp_path, checkpoint)
    found = read_torch_file(file, "state_dict")
    assert list(found) == list(model.state_dict())
    for name, tensor in model.state_dict().items():
        same(found[name], tensor)
    everything = read_torch_file(file)
    assert "state_dict.0.weight" in everything and "optimizer.state.0.exp_avg" in everything and "history.1.loss" in everything
    with pytest.raises(ValueError, match="file.pt holds no 'model', but a dictionary with 'state_dict', 'optimizer', 'epoch'"):
        read_torch_file(file, "model")
    with pytest.raises(ValueError, match=r"holds no 'state_dict.0', but a dictionary with '0.weight'"):
        read_torch_file(file, "state_dict", "0")
    with pytest.raises(ValueError, match="file.pt holds int instead of tensors by name"):
        read_torch_file(file, "epoch")


def test_whole_modules_are_refused_by_name(tmp_path):
    file = saved(tmp_path, {"model": torch.nn.Linear(2, 2)})
    with pytest.raises(
        ValueError, match=r"file.pt is not read: it asks for torch.nn.modules.linear.Linear, which is no part of"
    ):
        read_torch_file(file)


class Exploit:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def handmade(tmp_path, pickled: bytes, **entries: bytes):
    with zipfile.ZipFile(tmp_path / "file.pt", "w") as archive:
        archive.writestr("x/data.pkl", pickled)
        for name, data in entries.items():
            archive.writestr(f"x/{name}", data)
    return tmp_path / "file.pt"


def test_nothing_is_run(tmp_path):
    marker = tmp_path / "was run"
    code = f"open({str(marker)!r}, 'w').close()"
    for function, arguments in ((exec, (code,)), (eval, (code,)), (__import__, ("os",)), (getattr, (0, "real"))):
        file = saved(tmp_path, {"weight": Exploit(function, *arguments)})
        with pytest.raises(
            ValueError, match=rf"it asks for .*{function.__name__}, which is no part of a tensor and is not run"
        ):
            read_torch_file(file)
    import os

    file = saved(tmp_path, {"weight": Exploit(os.system, f"touch {marker}")})
    with pytest.raises(ValueError, match="it asks for posix.system"):
        read_torch_file(file)
    with pytest.raises(ValueError, match=r"it asks for torch.load"):
        read_torch_file(handmade(tmp_path, b"ctorch\nload\n(S'x'\ntR."))
    assert not marker.exists()


@pytest.mark.parametrize(
    "pickled, message",
    [
        (b"ctorch._utils\n_rebuild_tensor_v2\n(dS'_call'\nI1\nsb.", "it changes what a name stands for"),
        (b"ctorch._utils\n_rebuild_tensor_v2\nN}S'_call'\nI1\ns\x86b.", "it changes what a name stands for"),
        (b"ccollections\nOrderedDict\n)\x81.", "NEWOBJ|must be a type"),
        (b"ctorch\nFloatStorage\n(S'a'\ntR.", "holds NoneType instead of tensors"),
        (b"ctorch._utils\n_rebuild_tensor_v2\n(I1\nI0\n(I1\nt(I1\nttR.", "it describes a tensor that is none"),
        (b"(S'storage'\nS'FloatStorage'\nS'0'\nS'cpu'\nI4\ntQ.", "it describes a storage that is none"),
        (b"", "Ran out of input|EOF"),
        (b"\x80\x02}q\x00", "Ran out of input|EOF|exhausted"),
        (b"\xff\xff", "invalid load key"),
        (pickle.dumps([1, 2], 2), "holds list instead of tensors by name"),
        (b"]q\x00h\x00a.", "holds list"),
        (b"}q\x00S'a'\nh\x00s.", "more than 50 containers lie in each other, below 'a.a.a.a.a'"),
    ],
)
def test_bad_pickles(tmp_path, pickled, message):
    with pytest.raises(ValueError, match=rf"file.pt.*({message})"):
        read_torch_file(handmade(tmp_path, pickled))


def tensor(storage: str, count: int, offset: int, shape: str, stride: str) -> bytes:
    """The pickle of one tensor by name."""
    return (
        f"(dS'w'\nctorch._utils\n_rebuild_tensor_v2\n((S'storage'\nctorch\n{storage}\nS'0'\nS'cpu'\nI{count}\ntQ"
        f"I{offset}\n({shape}t({stride}tI00\nNttR"
    ).replace("NttR", "NtR").encode() + b"s."


def test_handmade_tensors(tmp_path):
    data = np.arange(6, dtype=np.float32)
    entries = {"data/0": data.tobytes()}
    found = read_torch_file(handmade(tmp_path, tensor("FloatStorage", 6, 1, "I2\nI2\n", "I1\nI3\n"), **entries))
    np.testing.assert_array_equal(found["w"].read(), [[1, 4], [2, 5]])
    for bad, message in [
        (tensor("FloatStorage", 6, 1, "I2\nI2\n", "I2\nI3\n"), r"a tensor of shape \[2, 2\] leaves its storage '0'"),
        (tensor("FloatStorage", 6, -1, "I2\n", "I1\n"), "it describes a tensor that is none"),
        (tensor("FloatStorage", 6, 5, "I2\n", "I-1\n"), "it describes a tensor that is none"),
        (tensor("FloatStorage", 6, 0, "I2\n", "I1\nI1\n"), "it describes a tensor that is none"),
        (tensor("FloatStorage", 7, 0, "I2\n", "I1\n"), "tensor 'w' needs 28 bytes in x/data/0, which has 24"),
        (tensor("DoubleStorage", 6, 0, "I2\n", "I1\n"), "tensor 'w' needs 48 bytes in x/data/0, which has 24"),
        (tensor("ComplexFloatStorage", 6, 0, "I2\n", "I1\n"), "it asks for torch.ComplexFloatStorage"),
    ]:
        with pytest.raises(ValueError, match=message):
            read_torch_file(handmade(tmp_path, bad, **entries))
    with pytest.raises(ValueError, match="needs 24 bytes in x/data/0, which has None"):
        read_torch_file(handmade(tmp_path, tensor("FloatStorage", 6, 0, "I2\n", "I1\n")))
    with pytest.raises(ValueError, match="it was written on a big-endian machine"):
        read_torch_file(handmade(tmp_path, tensor("FloatStorage", 6, 0, "I2\n", "I1\n"), byteorder=b"big", **entries))


def test_two_tensors_of_one_name(tmp_path):
    file = saved(tmp_path, {"a.b": torch.ones(2), "a": {"b": torch.zeros(2)}})
    with pytest.raises(ValueError, match="file.pt: two tensors are called 'a.b'"):
        read_torch_file(file)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_other_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file .*missing.pt"):
        read_torch_file(tmp_path / "missing.pt")
    file = saved(tmp_path, {"weight": torch.ones(2)}, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match="file.pt is in the format of torch before 1.6: load and save it with a newer one"):
        read_torch_file(file)
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), file)
    with pytest.raises(ValueError, match="file.pt is not read: it is a TorchScript program and not a file of torch.save"):
        read_torch_file(file)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("readme.txt", "nothing")
    with pytest.raises(ValueError, match="it is a zip archive without data.pkl"):
        read_torch_file(file)
    file.write_bytes(b"PK and nothing else")
    with pytest.raises(ValueError, match="file.pt is truncated or no file of torch.save"):
        read_torch_file(file)


def test_truncated_and_damaged_files(tmp_path):
    file = saved(tmp_path, {"weight": torch.arange(5000.0)})
    whole = file.read_bytes()
    for kept in (0, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:kept])
        with pytest.raises(ValueError, match="file.pt is truncated or no file of torch.save"):
            read_torch_file(file)
    place = whole.index(np.float32(1234).tobytes() + np.float32(1235).tobytes())
    file.write_bytes(whole[:place] + b"\xff" + whole[place + 1 :])
    stored = read_torch_file(file)["weight"]
    with pytest.raises(ValueError, match="file.pt is damaged: Bad CRC-32"):
        stored.read()
