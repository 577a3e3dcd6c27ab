import random
import re
from collections import Counter

import pytest
import torch

from unifusion_core.diffusion.flow import timesteps
from unifusion_core.diffusion.sampler import guided, initial_noise, sample_euler, sample_heun
from unifusion_core.diffusion.schedule import (
    MAX_LENGTH,
    Schedule,
    Segment,
    format_schedule,
    mix_tokens,
    parse_schedule,
    resolve,
    silent_segments,
    velocity_at,
)

SHAPE = (2, 3, 4, 4)


def pure(text, num_steps, sigmas=None):
    """The track of each step, in one string; tracks have names of one letter here."""
    mixes = resolve(parse_schedule(text), num_steps, sigmas)
    assert all(len(mix) == 1 and mix[0][1] == 1 for mix in mixes)
    return "".join(mix[0][0] for mix in mixes)


def test_the_written_form_is_read():
    assert parse_schedule("image:0-0.15, text:0.15-1").segments == (
        Segment(track="image", start=0, stop=0.15),
        Segment(track="text", start=0.15, stop=1),
    )
    assert parse_schedule("a:0-.4@sigma > b:0.6-1").segments == (
        Segment(track="a", start=0, stop=0.4, axis="sigma"),
        Segment(track="b", start=0.6, stop=1, fade=True),
    )


def test_spaces_do_not_matter():
    assert parse_schedule(" a : 0 - 0.5 @sigma ,\n b:0.5-1. ") == parse_schedule("a:0-0.5@sigma,b:0.5-1")


def random_schedule(rng):
    shares = sorted(rng.choice([rng.random(), rng.randrange(101) / 100, 1e-7 * rng.random()]) for _ in range(8))
    segments, start, fade = [], 0.0, False
    for i in range(rng.randrange(4)):
        segments.append((start, shares[2 * i], fade))
        fade = rng.random() < 0.5
        start = shares[2 * i + 1] if fade else shares[2 * i]
    segments.append((start, 1.0, fade))
    names = ["image", "text", "all", "Bild-2", "写真", "a.b_c"]
    return Schedule(
        tuple(
            Segment(track=rng.choice(names), start=a, stop=b, fade=f, axis=rng.choice(["steps", "sigma"]))
            for a, b, f in segments
        )
    )


def test_random_schedules_survive_writing_and_resolve_to_whole_mixes():
    rng = random.Random(0)
    for _ in range(500):
        schedule, num_steps = random_schedule(rng), rng.randrange(1, 60)
        assert parse_schedule(format_schedule(schedule)) == schedule
        mixes = resolve(schedule, num_steps, timesteps(num_steps, rng.uniform(0.3, 6)))
        assert len(mixes) == num_steps
        for mix in mixes:
            assert len(mix) in (1, 2) and all(0 < weight <= 1 for _, weight in mix)
            assert sum(weight for _, weight in mix) == pytest.approx(1)


@pytest.mark.parametrize(
    ("text", "culprit"),
    [
        ("", "empty"),
        ("  \n", "empty"),
        ("a:0-0.4, b:0.6-1", "gap between 'a:0-0.4' and 'b:0.6-1'"),
        ("a:0-0.6, b:0.5-1", "'a:0-0.6' and 'b:0.5-1' overlap"),
        ("a:0-0.6 > b:0.5-1", "'a:0-0.6' and 'b:0.5-1' overlap"),
        ("a:0.1-1", "start at 0 and not fade in, got 'a:0.1-1'"),
        ("a:0-0.9", "end at 1, got 'a:0-0.9'"),
        ("a:0-1.5", "share '1.5' in 'a:0-1.5'"),
        ("a:-0.5-1", "share '-0.5'"),
        ("a:0-nan", "share 'nan'"),
        ("a:0-inf", "share 'inf'"),
        ("a:0-1_0", "share '1_0'"),
        ("a:0-٠", "share '٠'"),
        ("a:0-0.5, b:0.5-0.2, c:0.2-1", "'b:0.5-0.2' runs backwards"),
        ("a:0-0.5, oops, b:0.5-1", "cannot read segment 'oops'"),
        ("a:0-1,", "cannot read segment ''"),
        ("> a:0-1", "cannot read segment ''"),
        (":0-1", "cannot read segment ':0-1'"),
        ("two words:0-1", "cannot read segment 'two words:0-1'"),
        ("a:0-1@time", "cannot read segment 'a:0-1@time'"),
        ("a:0-1e-3", "cannot read segment 'a:0-1e-3'"),
        ("a:0-1 b:0-1", "cannot read segment"),
        ("a" * 100_000, f"100000 characters; at most {MAX_LENGTH}"),
    ],
)
def test_an_error_names_its_cause(text, culprit):
    with pytest.raises(ValueError, match=re.escape(culprit)):
        parse_schedule(text)


def test_an_unknown_track_is_named_beside_the_known():
    assert parse_schedule("a:0-1", tracks=["a", "b"]).tracks == ("a",)
    with pytest.raises(ValueError, match="unknown track 'c' .* a, b"):
        parse_schedule("a:0-0.5, c:0.5-1", tracks=["b", "a"])


def test_a_segment_made_by_hand_is_checked_too():
    with pytest.raises(ValueError, match="share nan of track 'a'"):
        Segment(track="a", start=0, stop=float("nan"))
    with pytest.raises(ValueError, match="'a,b'"):
        Segment(track="a,b", start=0, stop=1)
    with pytest.raises(ValueError, match="not fade in"):
        Schedule((Segment(track="a", start=0, stop=1, fade=True),))


def test_a_boundary_falls_after_its_share_of_the_steps_halves_up():
    assert pure("i:0-0.15, t:0.15-1", 20) == "i" * 3 + "t" * 17
    assert pure("i:0-0.15, t:0.15-1", 4) == "i" + "t" * 3
    assert pure("i:0-0.5, t:0.5-1", 3) == "iit"
    for num_steps in range(1, 101):
        for percent in range(101):
            expected = (percent * num_steps + 50) // 100  # exact, in whole numbers
            assert pure(f"i:0-{percent / 100}, t:{percent / 100}-1", num_steps).count("i") == expected


def test_a_share_of_the_steps_ignores_the_sigmas():
    text = "i:0-0.15, t:0.15-1"
    assert pure(text, 20, timesteps(20, 5.0)) == pure(text, 20)
    assert pure(text, 3, [14.6, 3.1, 0.4, 0]) == pure(text, 3)


def test_many_tracks_may_follow_each_other_and_return():
    assert pure("a:0-0.2, b:0.2-0.5, c:0.5-0.7, a:0.7-1", 10) == "aabbbccaaa"


def test_the_sigma_axis_places_a_boundary_at_the_nearest_edge():
    text = "i:0-0.5@sigma, t:0.5-1@sigma"
    for num_steps in (3, 4, 7, 20):
        assert pure(text, num_steps, timesteps(num_steps)) == pure(text.replace("@sigma", ""), num_steps)
    assert pure(text, 8, timesteps(8, 3.0)) == "iiiiiitt"  # edges 1 .95 .9 .83 .75 .64 .5 .3 0
    assert pure(text, 4, [0.4, 0.3, 0.2, 0.1, 0]) == "tttt"  # a run that starts below the boundary


def test_one_sigma_mark_is_enough_where_two_segments_meet():
    expected = pure("i:0-0.5@sigma, t:0.5-1@sigma", 8, timesteps(8, 3.0))
    assert pure("i:0-0.5@sigma, t:0.5-1", 8, timesteps(8, 3.0)) == expected
    assert pure("i:0-0.5, t:0.5-1@sigma", 8, timesteps(8, 3.0)) == expected


def test_the_sigma_axis_needs_good_sigmas():
    schedule = parse_schedule("i:0-0.5@sigma, t:0.5-1")
    with pytest.raises(ValueError, match="'i:0-0.5@sigma' is on the sigma axis"):
        resolve(schedule, 4)
    for sigmas in ([], [1, 0], [0, 0.2, 0.5, 0.7, 1], [14.6, 5, 2, 1, 0], [1, float("nan"), 0.5, 0.2, 0]):
        with pytest.raises(ValueError, match="sigmas must be 5 falling values within 1..0"):
            resolve(schedule, 4, sigmas)


@pytest.mark.parametrize("num_steps", [0, -1, 2.0])
def test_a_bad_number_of_steps_is_named(num_steps):
    with pytest.raises(ValueError, match=f"at least 1, got {num_steps}"):
        resolve(parse_schedule("a:0-1"), num_steps)


def test_a_fade_is_linear_on_the_steps_between():
    mixes = resolve(parse_schedule("a:0-0.4 > b:0.6-1"), 20)
    assert mixes[:8] == [(("a", 1.0),)] * 8 and mixes[12:] == [(("b", 1.0),)] * 8
    assert mixes[8:12] == [(("a", 1 - w), ("b", w)) for w in (0.125, 0.375, 0.625, 0.875)]


def test_a_fade_may_take_the_whole_way_or_no_step():
    assert [mix[1][1] for mix in resolve(parse_schedule("a:0-0 > b:1-1"), 2)] == [0.25, 0.75]
    assert pure("a:0-0.5 > b:0.5-1", 4) == "aabb"
    assert pure("a:0-0.49 > b:0.51-1", 4) == "aabb"
    assert pure("a:0-0.2 > a:0.8-1", 5) == "aaaaa"


def test_a_segment_without_a_step_is_legal_and_reported():
    schedule = parse_schedule("i:0-0.02, t:0.02-1")
    assert pure("i:0-0.02, t:0.02-1", 20) == "t" * 20
    assert silent_segments(schedule, 20) == schedule.segments[:1]
    assert silent_segments(schedule, 50) == ()
    assert silent_segments(parse_schedule("a:0-0 > b:1-1"), 4) == ()


def tracks_of(*names, calls):
    def make(name, scale):
        def velocity(x, t, step):
            calls[name] += 1
            return torch.tanh(scale * x)

        return velocity

    return {name: make(name, i + 1) for i, name in enumerate(names)}


@pytest.mark.parametrize("sample", [sample_euler, sample_heun])
def test_a_schedule_of_one_track_equals_the_plain_run(sample):
    velocities, noise, edges = tracks_of("a", calls=Counter()), initial_noise(SHAPE, 0), timesteps(6, 3.0)
    for text in ("a:0-1", "a:0-0.3, a:0.3-1", "a:0-0.3 > a:0.6-1"):
        scheduled = velocity_at(resolve(parse_schedule(text), 6), velocities)
        assert torch.equal(sample(scheduled, noise, edges), sample(velocities["a"], noise, edges))


@pytest.mark.parametrize(("num_steps", "image", "text"), [(4, 1, 3), (20, 3, 17)])
def test_forwards_per_track_are_its_steps(num_steps, image, text):
    resolved, calls = resolve(parse_schedule("image:0-0.15, text:0.15-1"), num_steps), Counter()
    velocity = velocity_at(resolved, tracks_of("image", "text", calls=calls))
    sample_euler(velocity, initial_noise(SHAPE, 0), timesteps(num_steps))
    assert calls == {"image": image, "text": text}
    sample_heun(velocity, initial_noise(SHAPE, 0), timesteps(num_steps))
    assert calls == {"image": 3 * image, "text": 3 * text - 1}  # two more per step, one on the last


def test_a_fade_costs_two_forwards_on_its_steps_only():
    calls = Counter()
    velocity = velocity_at(resolve(parse_schedule("a:0-0.4 > b:0.6-1"), 20), tracks_of("a", "b", calls=calls))
    sample_euler(velocity, initial_noise(SHAPE, 0), timesteps(20))
    assert calls == {"a": 12, "b": 12}


def test_guidance_around_a_schedule_equals_guidance_inside_it():
    velocities, noise = tracks_of("a", "b", "none", calls=Counter()), initial_noise(SHAPE, 0, dtype=torch.float64)
    resolved = resolve(parse_schedule("a:0-0.4 > b:0.6-1"), 10)
    around = guided(velocity_at(resolved, velocities), velocities["none"], 4.0)
    inside = velocity_at(resolved, {name: guided(velocities[name], velocities["none"], 4.0) for name in "ab"})
    edges = timesteps(10)
    torch.testing.assert_close(sample_euler(around, noise, edges), sample_euler(inside, noise, edges))


def test_a_track_without_velocity_is_named_before_sampling():
    with pytest.raises(ValueError, match="no velocity for track 'b'; there is a"):
        velocity_at(resolve(parse_schedule("a:0-0.5, b:0.5-1"), 4), tracks_of("a", calls=Counter()))


def test_equal_tokens_interpolate_and_unequal_ones_are_named():
    tokens = {"a": torch.zeros(1, 5, 8), "b": torch.ones(1, 5, 8), "c": torch.ones(1, 6, 8)}
    assert torch.equal(mix_tokens((("a", 0.25), ("b", 0.75)), tokens), torch.full((1, 5, 8), 0.75))
    assert mix_tokens((("c", 1.0),), tokens) is tokens["c"]
    with pytest.raises(ValueError, match=r"'c': \(1, 6, 8\)"):
        mix_tokens((("a", 0.5), ("c", 0.5)), tokens)
