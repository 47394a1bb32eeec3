r"""Algorithms of the literature. Each preset is a choice of critic, estimator, states and weights for the same objective.

Every preset is one call of `compose`. Read it as the definition of the algorithm, and write your own in the same way. All of them
sum log-densities and KL over state dimensions, and penalise the path KL in nats (`conversions` translates published constants).
"""

from ..advantages import Clip, centre, standardise_per_time
from ..critics import Critic, Target, ValueLoss, kl_to_go, log_ratio_to_go, returns, soft_error, squared_error
from ..estimators import (
    GradientBalance,
    LeanAdjoint,
    LikelihoodRatio,
    LogVariance,
    Matching,
    PathConsistency,
    Pathwise,
    WeightedLikelihood,
    discount_per_step,
    exponential_increment,
    exponential_return,
    last,
    late,
)
from ..estimators.likelihood_ratio import Normalise
from ..estimators.pathwise import Credit
from ..objective import Objective
from ..replay import Reference, ReplayBuffer
from ..values import AbstractValue, NoValue, X0RewardValue
from .compose import compose
from .training import Algorithm, Training

INFINITE = float("inf")
SQDF_DISCOUNT = discount_per_step(0.9)
"""The published discount per step. It does not adapt to the number of steps."""


def score_as_action(
    objective: Objective,
    value: AbstractValue,
    training: Training,
    *,
    clip: Clip = INFINITE,
    horizon: float = 0.0,
    target: Target = kl_to_go,
    normalise: Normalise | None = None,
    max_advantage: float = INFINITE,
    denoise_with_policy: bool = False,
) -> Algorithm:
    r"""Score as Action: continuous-time PPO (or TRPO). Advantages are increments of a learned value.

    `sum_j E[min(rho_j A_j, clip(rho_j) A_j)] - lambda sum_j E[kl_j]`, `A_j = V(t_{j+1}, x_{j+1}) - V(t_j, x_j) - lambda kl_j`; the
    value is regressed on the return to go at all times. TRPO is `Training(policy=NaturalGradient(radius), ...)`.

    Args:
        objective, value, training: see `compose`; the value is learned, so `training.value` is an optimiser.
        clip: the likelihood ratio is clipped to `1 +- clip`; inf is no clipping. Log-densities are *summed* over state
            dimensions, so usual values (0.1 to 0.3) apply. They do not in code that averages log-densities.
        horizon: decay time of the advantages, control time (`advantages.advantages`); 0, as published: single increments.
        target: the regression target of the value. With the published `returns` and `kl_weight > 0` the fixed point is not the
            maximiser of J. The advantages include the KL of their interval if and only if the target does.
        normalise: `standardise_per_time` as published, or `centre`, or None. Dividing changes the KL penalty relative to the reward.
        max_advantage: largest magnitude of an advantage, after normalisation (published: 5).
        denoise_with_policy: see `compose`.

    Deviations from the paper at the defaults: KL-to-go in the target; no standardisation and no clamp; log-ratios summed;
    `x_hat` of the value from the reference.

    ??? cite "Reference"
        ```bibtex
        @inproceedings{zhao2025score, title={Score as Action: Fine-Tuning Diffusion Generative Models by Continuous-time
          Reinforcement Learning}, author={Zhao, Hanyang and Chen, Haoxian and Zhang, Ji and Yao, David D. and Tang, Wenpin},
          booktitle={ICML}, year={2025}, eprint={2502.01819}}
        ```
    """
    estimator = LikelihoodRatio(horizon, clip, normalise, max_advantage, kl_to_go=target is not returns)
    critic = Critic(value, target)
    return compose(objective, estimator, critic, training, denoise_with_policy=denoise_with_policy)


def ddpo(objective: Objective, training: Training, *, clip: Clip = 0.2) -> Algorithm:
    r"""DDPO, importance-sampled: `sum_j min(rho_j A, clip(rho_j) A)` with `A = (r - mean r) / std r`; use `kl_weight = 0`.

    The objective `E r` has no maximiser in general: read its reward against its path KL. Black et al. 2024, section 4.3. Deviations:
    log-ratios are summed over state dimensions (their code averages them). Mean and standard deviation are over the batch, or with
    conditions over its paths of the same prompt (their code keeps them over iterations).

    ??? cite "Reference"
        ```bibtex
        @inproceedings{black2024ddpo, title={Training Diffusion Models with Reinforcement Learning},
          author={Black, Kevin and Janner, Michael and Du, Yilun and Kostrikov, Ilya and Levine, Sergey},
          booktitle={ICLR}, year={2024}}
        ```
    """
    return compose(objective, LikelihoodRatio(INFINITE, clip, standardise_per_time), no_critic(objective), training)


def dpok(objective: Objective, training: Training, *, clip: Clip = INFINITE) -> Algorithm:
    r"""DPOK: likelihood ratio of the return with a KL penalty: `A_j = r - lambda sum_{l >= j} kl_l`, less its batch mean.

    Fan et al. 2023, algorithm 1. Deviations: the return includes the KL of later steps, `kl_l` for `l > j`, which their gradient leaves
    out; without it the fixed point is not the maximiser of J. The baseline is the batch mean and not a learned one.

    ??? cite "Reference"
        ```bibtex
        @inproceedings{fan2023dpok, title={DPOK: Reinforcement Learning for Fine-tuning Text-to-Image Diffusion Models},
          author={Fan, Ying and Watkins, Olivia and Du, Yuqing and Liu, Hao and Ryu, Moonkyung and Boutilier, Craig and Abbeel,
          Pieter and Ghavamzadeh, Mohammad and Lee, Kangwook and Lee, Kimin}, booktitle={NeurIPS}, year={2023}}
        ```
    """
    return compose(objective, LikelihoodRatio(INFINITE, clip, centre), no_critic(objective), training)


def flow_grpo(objective: Objective, training: Training, *, clip: Clip = 0.2) -> Algorithm:
    r"""Flow-GRPO: `A = (r - mean r) / std r` within a group, a clipped ratio, and a separate KL penalty for each step.

    Liu et al. 2025, eq. 5 and 6. The group is the batch, or with conditions its paths of the same prompt. The KL enters by its own
    gradient only and not through the advantages, so with `kl_weight > 0` the fixed point is not the maximiser of J. Dividing by the
    standard deviation makes the effective temperature `kl_weight std(r)`.

    ??? cite "Reference"
        ```bibtex
        @article{liu2025flowgrpo, title={Flow-GRPO: Training Flow Matching Models via Online RL}, author={Liu, Jie and Liu, Gongye and
          Liang, Jiajun and Li, Yangguang and Liu, Jiaheng and Wang, Xintao and Wan, Pengfei and Zhang, Di and Ouyang, Wanli},
          journal={arXiv:2505.05470}, year={2025}}
        ```
    """
    estimator = LikelihoodRatio(INFINITE, clip, standardise_per_time, kl_to_go=False)
    return compose(objective, estimator, no_critic(objective), training)


def vard(
    objective: Objective,
    value: AbstractValue,
    training: Training,
    *,
    target: Target = returns,
    loss: ValueLoss = squared_error,
    steps: int = 1,
    frozen: bool = False,
) -> Algorithm:
    r"""VARD: a learned value of intermediate states; the policy gradient is differentiated through one sampler step into it.

    This is a reconstruction, because the paper's code is not public. The value minimises `E (V(t, x_t) - r(X_T))^2`; the policy minimises
    `E[-V(t', x'(theta)) + lambda kl]` over steps from on-policy states. The paper leaves some choices open; they are arguments here.

    Args:
        objective, training: see `compose`.
        value: a `StructuredValue` sees the denoised or the noisy state (`denoised=...`), a `PlainValue` the noisy one. A black-box
            reward needs `PlainValue`.
        target, loss: `returns` with `squared_error` learns the arithmetic mean; its fixed point is not J's maximiser.
            `log_ratio_to_go` with `soft_error` learns the soft value; its fixed point is J's maximiser.
        steps: sampler steps to differentiate through.
        frozen: keep the given value; otherwise every iteration trains it, too.

    ??? cite "Reference"
        ```bibtex
        @article{dai2025vard, title={VARD: Efficient and Dense Fine-Tuning for Diffusion Models with Value-based RL},
          author={Dai, Fengyuan and Li, Zifeng and others}, journal={arXiv:2505.15791}, year={2025}}
        ```
    """
    return compose(objective, Pathwise(steps), Critic(value, target, loss, frozen=frozen), training)


def soft_vard(objective: Objective, value: AbstractValue, training: Training) -> Algorithm:
    """`vard` with the soft value `lambda log E^ref exp(r / lambda)` as critic: its fixed point is the maximiser of J."""
    return vard(objective, value, training, target=log_ratio_to_go, loss=soft_error)


def sqdf(
    objective: Objective, training: Training, *, discount: Credit = SQDF_DISCOUNT, capacity: int | None = None
) -> Algorithm:
    r"""SQDF: the gradient of the reward of the x0 prediction after one step, discounted, from replayed states.

    The policy minimises `E[-w r(x_hat(t', x'(theta))) + lambda kl]`, with the discount `w = 0.9^(steps to go)`. The discount makes the
    temperature depend on time, so the fixed point is not `p_ref exp(r/lambda)`. `conversions.sqdf_kl_weight` translates the paper's alpha.

    Args:
        objective: its `x0_prediction` makes `x_hat`: the posterior mean, or `few_step_ode(1)` in place of the paper's consistency model.
        training: see `compose`.
        discount: the weights `w`. The default discounts every step, as the paper does with its 50 steps. For another number of steps
            `estimators.discount_per_time((t1 - t0) / (50 ln(1/0.9)))` discounts the same per unit of time.
        capacity: paths in the replay buffer, first in first out (default: eight batches).

    ??? cite "Reference"
        ```bibtex
        @article{sqdf2025, title={Diffusion Fine-Tuning via Reparameterized Policy Gradient of the Soft Q-Function},
          author={Kang, Hyeongyu and others}, journal={arXiv:2512.04559}, year={2025}}
        ```
    """
    buffer = ReplayBuffer(8 * training.batch if capacity is None else capacity)
    return compose(objective, Pathwise(1, credit=discount), x0_reward_critic(objective), training, behaviour=buffer)


def draft(objective: Objective, training: Training, *, steps: int | None = None, small_memory: bool = False) -> Algorithm:
    r"""DRaFT-K: `-E r(X_T)` differentiated through the last `steps` steps of the sampler; `None`: through all of them (DRaFT).

    Clark et al. 2024, algorithm 1. The paper has no KL penalty (`kl_weight = 0`); with one, the KL of these steps is penalised.
    `small_memory` recomputes steps in the backward pass (`estimators.Pathwise`).

    ??? cite "Reference"
        ```bibtex
        @inproceedings{clark2024draft, title={Directly Fine-Tuning Diffusion Models on Differentiable Rewards},
          author={Clark, Kevin and Vicol, Paul and Swersky, Kevin and Fleet, David J.}, booktitle={ICLR}, year={2024}}
        ```
    """
    k = objective.intervals if steps is None else steps
    estimator = Pathwise(k, last(k), small_memory=small_memory)
    return compose(objective, estimator, x0_reward_critic(objective), training)


def alignprop(objective: Objective, training: Training) -> Algorithm:
    r"""AlignProp: DRaFT through the whole chain, in small memory: steps are recomputed in the backward pass.

    Prabhudesai et al. 2023. Deviation: the chain is not truncated at random; `draft(steps=K)` truncates it at a fixed K.

    ??? cite "Reference"
        ```bibtex
        @article{prabhudesai2023alignprop, title={Aligning Text-to-Image Diffusion Models with Reward Backpropagation},
          author={Prabhudesai, Mihir and Goyal, Anirudh and Pathak, Deepak and Fragkiadaki, Katerina},
          journal={arXiv:2310.03739}, year={2023}}
        ```
    """
    return draft(objective, training, small_memory=True)


def refl(objective: Objective, training: Training, *, fraction: float = 0.25) -> Algorithm:
    r"""ReFL: the reward of the policy's own posterior mean at a late time, `-E r(x_hat_theta(t_j, x_j))`, `t_j` in the last `fraction`.

    Xu et al. 2023, algorithm 1. Deviations: all late times are used instead of a random one; their reward map (a ReLU) is left out.

    ??? cite "Reference"
        ```bibtex
        @inproceedings{xu2023imagereward, title={ImageReward: Learning and Evaluating Human Preferences for Text-to-Image Generation},
          author={Xu, Jiazheng and Liu, Xiao and Wu, Yuchen and Tong, Yuxuan and Li, Qinkai and Ding, Ming and Tang, Jie and Dong, Yuxiao},
          booktitle={NeurIPS}, year={2023}}
        ```
    """
    return compose(objective, Pathwise(0, late(fraction)), x0_reward_critic(objective), training)


def adjoint_matching(objective: Objective, training: Training, *, horizon: float = INFINITE) -> Algorithm:
    r"""Adjoint Matching: the control is regressed on minus the noise level times the lean adjoint along its own paths.

    It minimises `E sum_j |u_theta + sigma a_{j+1}|^2 / 2`; Domingo-Enrich et al. 2025, eq. 37 to 39. The reward must be differentiable.
    With `eta = 1` the optimum is the reweighted law. Deviations: the adjoint belongs to the chain's own steps (the paper: an Euler step)
    and is taken at the end of a step, which is exact for the chain; all steps are used, and none is clipped. A finite `horizon`
    (control time) bootstraps the adjoint from the policy itself: the same fixed point with less noise (`estimators.LeanAdjoint`).

    ??? cite "Reference"
        ```bibtex
        @inproceedings{domingoenrich2025adjoint, title={Adjoint Matching: Fine-tuning Flow and Diffusion Generative Models with
          Memoryless Stochastic Optimal Control}, author={Domingo-Enrich, Carles and Drozdzal, Michal and Karrer, Brian and
          Chen, Ricky T. Q.}, booktitle={ICLR}, year={2025}}
        ```
    """
    return compose(objective, Matching(LeanAdjoint(horizon)), no_critic(objective), training)


def rwr(objective: Objective, training: Training) -> Algorithm:
    r"""Reward-weighted regression: maximum likelihood on the reference's paths, weighted with `exp(r / lambda)`.

    Peters and Schaal 2007; Lee et al. 2023 for diffusion. States are always those of the reference, so the fixed point is the optimal
    policy. On the policy's own paths, the temperature would fall with every repetition.

    ??? cite "Reference"
        ```bibtex
        @inproceedings{peters2007rwr, title={Reinforcement Learning by Reward-Weighted Regression for Operational Space Control},
          author={Peters, Jan and Schaal, Stefan}, booktitle={ICML}, year={2007}}
        ```
    """
    estimator = WeightedLikelihood(exponential_return)
    return compose(objective, estimator, no_critic(objective), training, behaviour=Reference())


def vidd(objective: Objective, training: Training) -> Algorithm:
    r"""VIDD: distils the soft-optimal step of an approximate value, by weights `exp((r(x_hat(t', x')) - r(x_hat(t, x))) / lambda)`.

    Su et al. 2025: the forward KL to `p_ref(x' | x) exp(V(t', x') / lambda)`, with the reward of the posterior mean as value. Deviation:
    all states are the reference's, so the weights need no likelihood ratio; the paper mixes in the policy's own states.

    ??? cite "Reference"
        ```bibtex
        @article{su2025vidd, title={Iterative Distillation for Reward-Guided Fine-Tuning of Diffusion Models in Biomolecular Design},
          author={Su, Xingyu and Li, Xiner and Uehara, Masatoshi and others}, journal={arXiv:2507.00445}, year={2025}}
        ```
    """
    estimator = WeightedLikelihood(exponential_increment)
    return compose(objective, estimator, x0_reward_critic(objective), training, behaviour=Reference())


def log_variance(objective: Objective, training: Training) -> Algorithm:
    r"""Log-variance divergence (VarGrad): `Var(r - costs - lambda log dP^a/dP^ref) / (2 lambda)` over the policy's own paths.

    Nuesken and Richter 2021; Richter and Berner 2024 for sampling. The start must be fixed or forgotten (memoryless reference).

    ??? cite "Reference"
        ```bibtex
        @article{nuesken2021logvariance, title={Solving high-dimensional Hamilton-Jacobi-Bellman PDEs using neural networks:
          perspectives from the theory of controlled diffusions and measures on path space}, author={N{\"u}sken, Nikolas and
          Richter, Lorenz}, journal={Partial Differential Equations and Applications}, year={2021}}
        ```
    """
    return compose(objective, LogVariance(), no_critic(objective), training)


def path_consistency(objective: Objective, value: AbstractValue, training: Training, *, span: int | None = None) -> Algorithm:
    r"""Path consistency: the identity of the optimal law on windows of `span` intervals, with a learned soft value.

    Nachum et al. 2017, eq. 13. With `span=None` a window is the rest of the path; this is the log-variance with a baseline at every
    state. The value is regressed on the realised `log_ratio_to_go`, which has no variance at the optimum.

    ??? cite "Reference"
        ```bibtex
        @inproceedings{nachum2017pcl, title={Bridging the Gap Between Value and Policy Based Reinforcement Learning},
          author={Nachum, Ofir and Norouzi, Mohammad and Xu, Kelvin and Schuurmans, Dale}, booktitle={NeurIPS}, year={2017}}
        ```
    """
    return compose(objective, PathConsistency(span), Critic(value, log_ratio_to_go), training)


def nabla_db(objective: Objective, value: AbstractValue, training: Training) -> Algorithm:
    r"""Residual nabla-DB: detailed balance of the optimal law, differentiated in both ends of a step.

    Liu et al. 2025. Deviations: the residual flow's score is the gradient of a scalar (structured) value over lambda. The policy is
    trained by the forward residual and the value by the reverse one (the paper sums both for both). Gradients are not clipped by time.

    ??? cite "Reference"
        ```bibtex
        @inproceedings{liu2025nabladb, title={Efficient Diversity-Preserving Diffusion Alignment via Gradient-Informed GFlowNets},
          author={Liu, Zhen and Xiao, Tim Z. and Liu, Weiyang and Bengio, Yoshua and Zhang, Dinghuai}, booktitle={ICLR}, year={2025},
          eprint={2412.07775}}
        ```
    """
    return compose(objective, GradientBalance(), Critic(value, log_ratio_to_go), training)


def no_critic(objective: Objective) -> Critic:
    """A critic without a value: advantages are returns."""
    return Critic(NoValue(objective.sampler.process.t0, objective.sampler.process.t1))


def x0_reward_critic(objective: Objective) -> Critic:
    """A critic with the reward of the x0 prediction as value; nothing is learned."""
    return Critic(X0RewardValue(objective.sampler.process.t0, objective.sampler.process.t1))
