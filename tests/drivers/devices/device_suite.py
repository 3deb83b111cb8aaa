"""What every device must do. Subclass and provide the fixture ``make``."""

import pytest

from llmos.drivers.errors import DeviceUnavailable
from llmos.drivers.protocols import DeviceDriver


class DeviceSuite:
    def test_it_says_what_it_is(self, make):
        device = make()
        assert isinstance(device, DeviceDriver)
        info = device.info
        assert info == device.info
        assert info.name.startswith(f"{info.kind}:")
        assert 0 < info.budget_bytes <= info.total_bytes
        assert info.threads >= 1
        assert device.torch_device.split(":")[0] in ("cpu", "cuda")

    def test_a_given_budget_and_quota_are_kept(self, make):
        info = make(budget_bytes=12345678, threads=3).info
        assert (info.budget_bytes, info.threads) == (12345678, 3)

    @pytest.mark.parametrize("wrong", [{"budget_bytes": 0}, {"budget_bytes": -5}, {"threads": 0}])
    def test_impossible_shares_are_refused(self, make, wrong):
        with pytest.raises(DeviceUnavailable):
            make(**wrong)

    def test_a_device_that_is_not_there(self, make):
        with pytest.raises(DeviceUnavailable):
            make(index=-1)

    def test_usage(self, make):
        usage = make().usage()
        assert usage.used_bytes >= 0
        assert usage.utilisation is None or 0 <= usage.utilisation <= 1
