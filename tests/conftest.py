"""Which tests come first: where several workers share the files, the longest must not be left for the end."""

LONGEST = (
    "test_training_layouts.py",
    "test_kernels_triton.py",
    "test_readme.py",
    "test_training_resume.py",
    "test_checkpoint_layouts.py",
    "test_benchmarks.py",
    "test_model_shards.py",
    "test_preprocess_resume.py",
    "test_launch.py",
    "test_training_plan.py",
    "test_training_watch.py",
    "test_training_bad_input.py",
)


def pytest_collection_modifyitems(items: list) -> None:
    order = {name: index for index, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(LONGEST)))
