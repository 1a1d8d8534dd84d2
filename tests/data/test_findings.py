import json

from qtune.data.findings import MOST_KEPT, Finding, Findings


def found(number, kind="cut"):
    return Finding(f"a:{number}", f"is {kind}", False, kind)


def test_as_text():
    assert str(found(9)) == "a:9: is cut"


def test_all_are_counted_and_the_first_of_each_kind_are_kept():
    findings = Findings()
    findings.add(*(found(i) for i in range(20)), found(7, "no BOS"))
    assert findings.counts == {"cut": 20, "no BOS": 1}
    assert findings.of("cut") == [found(i) for i in range(MOST_KEPT)]
    assert findings.of("no BOS") == [found(7, "no BOS")] and findings.of("repeated") == []


def test_merged_findings_count_together():
    one, two, three = Findings(), Findings(), Findings()
    one.add(*(found(i) for i in range(3)))
    two.add(*(found(i) for i in range(10, 20)))
    three.add(found(1, "no BOS"))
    one.merge(two, three)
    assert one.counts == {"cut": 13, "no BOS": 1}
    assert [finding.place for finding in one.of("cut")] == ["a:0", "a:1", "a:2", "a:10", "a:11"]


def test_json_keeps_them():
    findings = Findings()
    findings.add(*(found(i) for i in range(9)))
    again = Findings.from_json(json.loads(json.dumps(findings.to_json())))
    assert again.counts == findings.counts and again.kept == findings.kept
