import mmap
import os
import subprocess
import sys
import threading

import pytest
import torch

from llmos.drivers.devices import cpu
from llmos.drivers.devices.cpu import CpuDevice
from llmos.drivers.devices.cuda import CudaDevice
from llmos.drivers.devices.discover import discover
from llmos.drivers.devices.memory import MemoryDevice
from llmos.drivers.errors import DeviceUnavailable
from tests.drivers.devices.device_suite import DeviceSuite

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")


class TestCpuDevice(DeviceSuite):
    @pytest.fixture
    def make(self):
        return CpuDevice

    def test_there_is_one(self):
        with pytest.raises(DeviceUnavailable):
            CpuDevice(1)

    def test_a_budget_above_the_memory_is_refused(self):
        total = CpuDevice().info.total_bytes
        with pytest.raises(DeviceUnavailable):
            CpuDevice(budget_bytes=total + 1)

    def test_threads_fit_the_affinity_mask(self):
        assert CpuDevice().info.threads <= len(os.sched_getaffinity(0))

    def test_usage_sees_memory_that_is_taken(self):
        device = CpuDevice()
        before = device.usage().used_bytes
        # Fresh pages: an array may be given memory that this process has freed but not returned.
        with mmap.mmap(-1, 64 << 20) as block:
            block.write(b"x" * (64 << 20))
            assert device.usage().used_bytes > before + (48 << 20)

    def test_the_quota_holds_in_the_calling_thread(self):
        device, seen = CpuDevice(), []

        def compute():
            device.set_threads(1)
            seen.append(torch.get_num_threads())

        thread = threading.Thread(target=compute)
        thread.start()
        thread.join()
        assert seen == [1]

    def test_a_container_limit_is_respected(self, tmp_path, monkeypatch):
        (tmp_path / "memory.max").write_text("1000000\n")
        (tmp_path / "memory.current").write_text("400000\n")
        (tmp_path / "cpu.max").write_text("150000 100000\n")
        monkeypatch.setattr(cpu, "_CGROUP", tmp_path)
        assert cpu.memory_bytes() == (1000000, 600000)
        assert cpu.usable_threads() == 1
        assert CpuDevice().info.budget_bytes == 360000


class TestMemoryDevice(DeviceSuite):
    @pytest.fixture
    def make(self):
        return MemoryDevice

    def test_it_reports_what_it_was_told(self):
        device = MemoryDevice(3, budget_bytes=1000)
        device.occupy(400)
        assert device.usage().used_bytes == 400
        assert device.info.name == "cpu:3"
        with pytest.raises(ValueError, match="1001"):
            device.occupy(1001)


@needs_cuda
class TestCudaDevice(DeviceSuite):
    @pytest.fixture
    def make(self):
        return CudaDevice

    def test_usage_sees_memory_that_is_taken(self):
        device = CudaDevice(0)
        before = device.usage().used_bytes
        block = torch.ones(256 << 20, dtype=torch.uint8, device="cuda:0")
        assert device.usage().used_bytes >= before + (200 << 20)
        del block


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA GPU")
def test_without_cuda_it_says_so():
    with pytest.raises(DeviceUnavailable) as caught:
        CudaDevice(0)
    assert caught.value.device == "cuda:0"
    assert caught.value.remedy


def test_discover_finds_the_cpu_first():
    found = discover()
    assert found[0].name == "cpu:0"
    assert [d.kind for d in found[1:]] == ["cuda"] * (len(found) - 1)
    assert len(found) - 1 == torch.cuda.device_count()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA GPU")
def test_discover_needs_no_torch_to_find_no_gpu():
    code = (
        "import sys; from llmos.drivers.devices.discover import discover; discover();"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
