from benchmarks.measuring.paired import Settings
from benchmarks.play import alone


def test_the_server_is_measured_as_a_user_starts_it() -> None:
    claims = alone(Settings(toy=True, rounds=1))
    assert [claim.unit for claim in claims] == ["%", "ms", "×", "s"]
    late, latency, memory, reset = (claim.figure.median for claim in claims)
    assert 0 <= late <= 1
    assert latency > 0
    assert memory > 0
    assert reset > 0
