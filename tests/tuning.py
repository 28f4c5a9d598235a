"""Fine-tuned versions of transformers' models, for the tests of what serves them."""

import torch


def save_tuned(model, folder, tasks, step):
    """Saves, by task, the model with every parameter moved at random. It is as it was then."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for seed, task in enumerate(tasks, 1):
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(step * torch.randn_like(parameter))
        model.save_pretrained(folder / task)
        model.load_state_dict(before)
